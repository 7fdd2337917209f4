"""Image quality: feature extractors, exact distances between sets of images and between paired ones,
streaming accumulation."""

from aquabit.quality.accumulate import PAIRED, Quality, Source
from aquabit.quality.features import METRICS_OF, DigitsFeatures, FeatureExtractor, Features, NonFiniteImages
from aquabit.quality.gauge import Gauge, QualityOptions
from aquabit.quality.own import NonFiniteValues, OwnMetric
from aquabit.quality.reference import Reference, bundled_reference, held_out_digits

__all__ = [
    "METRICS_OF",
    "PAIRED",
    "DigitsFeatures",
    "FeatureExtractor",
    "Features",
    "Gauge",
    "NonFiniteImages",
    "NonFiniteValues",
    "OwnMetric",
    "Quality",
    "QualityOptions",
    "Reference",
    "Source",
    "bundled_reference",
    "held_out_digits",
]
