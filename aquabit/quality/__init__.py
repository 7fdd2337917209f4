"""Image quality: feature extractors, exact distances between sets of images and between paired ones, streaming accumulation."""

from aquabit.quality.accumulate import PAIRED, Quality
from aquabit.quality.features import DigitsFeatures, FeatureExtractor, Features, NonFiniteImages
from aquabit.quality.reference import Reference, bundled_reference, held_out_digits

__all__ = [
    "PAIRED",
    "DigitsFeatures",
    "FeatureExtractor",
    "Features",
    "NonFiniteImages",
    "Quality",
    "Reference",
    "bundled_reference",
    "held_out_digits",
]
