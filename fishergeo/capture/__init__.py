"""From a model and its batches to records: each captured layer's inputs and output gradients, example by example."""

from fishergeo.capture.at_rest import Autocast, differentiate
from fishergeo.capture.batches import indexed, is_padded, most_examples, padding_mask, sized, target_mask, to_device
from fishergeo.capture.hooks import Capture
from fishergeo.capture.identity import batch_mark, check_model, content_mark, fingerprint, header_fields
from fishergeo.capture.layers import Layer, LayerFilter, select_layers
from fishergeo.capture.matrices import gradient_matrix, layer_parameters, weight_matrix, write_matrix
from fishergeo.capture.model_adapters import adapter_factors, decoder_inputs, is_encoder_decoder, plain_name
from fishergeo.capture.objectives.by_kind import (
    KINDS,
    REDUCTIONS,
    LossFunction,
    Objective,
    example_objectives,
)
from fishergeo.capture.objectives.labels import Alignment, label_alignment
from fishergeo.capture.objectives.own_loss import check_own_loss
from fishergeo.capture.objectives.weights import FirstTokens, WeightSource, checked_example_weights, take_weights
from fishergeo.capture.records import Record
from fishergeo.capture.standins import provable, stand_ins

__all__ = [
    "KINDS",
    "REDUCTIONS",
    "Alignment",
    "Autocast",
    "Capture",
    "FirstTokens",
    "Layer",
    "LayerFilter",
    "LossFunction",
    "Objective",
    "Record",
    "WeightSource",
    "adapter_factors",
    "batch_mark",
    "check_model",
    "check_own_loss",
    "checked_example_weights",
    "content_mark",
    "decoder_inputs",
    "differentiate",
    "example_objectives",
    "fingerprint",
    "gradient_matrix",
    "header_fields",
    "indexed",
    "is_encoder_decoder",
    "is_padded",
    "label_alignment",
    "layer_parameters",
    "most_examples",
    "padding_mask",
    "plain_name",
    "provable",
    "select_layers",
    "sized",
    "stand_ins",
    "take_weights",
    "target_mask",
    "to_device",
    "weight_matrix",
    "write_matrix",
]
