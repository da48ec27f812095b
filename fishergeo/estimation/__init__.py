"""One pass over the data to a Fisher: estimated whole, streamed, in shards, or over several processes."""

from fishergeo.estimation.distributed import all_reduce
from fishergeo.estimation.estimate import estimate_fisher
from fishergeo.estimation.fisher import Fisher, FisherHeader
from fishergeo.estimation.options import DataKeywords, DataOptions, chosen_options, option_facts
from fishergeo.estimation.shards import sketch_shards
from fishergeo.estimation.streaming import StreamingFisher
from fishergeo.estimation.verify import NeverCalled, faults_shown

__all__ = [
    "DataKeywords",
    "DataOptions",
    "Fisher",
    "FisherHeader",
    "NeverCalled",
    "StreamingFisher",
    "all_reduce",
    "chosen_options",
    "estimate_fisher",
    "faults_shown",
    "option_facts",
    "sketch_shards",
]
