"""Comparisons behind the evidence page: rivals, sweeps and their statistics. Not in the wheel."""

from studies.ablation import ANCHOR, GUARDS, rivals_plan
from studies.bench import GUARD, Bench, make_job, measure_base, run_job
from studies.forgetting_law import fit_scaling_law
from studies.ledger import Ledger, run_jobs
from studies.statistics import Shift, shift

__all__ = [
    "ANCHOR",
    "GUARD",
    "GUARDS",
    "Bench",
    "Ledger",
    "Shift",
    "fit_scaling_law",
    "make_job",
    "measure_base",
    "rivals_plan",
    "run_job",
    "run_jobs",
    "shift",
]
