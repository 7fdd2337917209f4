"""Every figure, for papers: a function of its table (``catalog.all_tables``) and an ``Axes``."""

from aquabit.reports.subjects.chosen import draw_chosen_bits, draw_step_bits
from aquabit.reports.subjects.chosen import draw_chosen_schemes as chosen_schemes
from aquabit.reports.subjects.fronts import draw_frontier, draw_progress
from aquabit.reports.subjects.groups import draw_block_operator
from aquabit.reports.subjects.groups import draw_group_effects as group_effects
from aquabit.reports.subjects.interactions import draw_pairs
from aquabit.reports.subjects.layer_graph import draw_layer_graph
from aquabit.reports.subjects.noise import draw_noise
from aquabit.reports.subjects.quality import draw_quality_vs_bits as quality_vs_bits
from aquabit.reports.subjects.ranking import draw_layer_ranking as layer_ranking
from aquabit.reports.subjects.scheme_scores import draw_scores
from aquabit.reports.subjects.shap_values import draw_swarm
from aquabit.reports.subjects.swaps import draw_swaps as swaps_scatter
from aquabit.reports.subjects.trust import draw_curve
from aquabit.reports.subjects.trust import draw_surrogate_scatter as surrogate_scatter

__all__ = [
    "chosen_schemes",
    "draw_block_operator",
    "draw_chosen_bits",
    "draw_curve",
    "draw_frontier",
    "draw_layer_graph",
    "draw_noise",
    "draw_pairs",
    "draw_progress",
    "draw_scores",
    "draw_step_bits",
    "draw_swarm",
    "group_effects",
    "layer_ranking",
    "quality_vs_bits",
    "surrogate_scatter",
    "swaps_scatter",
]
