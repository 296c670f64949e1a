"""The numbers of the paper's tables (UniCTokens-R1, Tables 1, 2, 3 and 5), as they are printed there.

By table and row; the values stand in the order of the columns of `evaluate.tables.TABLES`, None where the paper has a
dash. Of Table 5 the generation part of Yo'Chameleon, UniCTokens and the real images is left out: the copy at hand does
not say which number belongs to which row.
"""

from __future__ import annotations

from ..evaluate.tables import TABLES

Row = tuple[float | None, ...]

_DRAWN = (None,) * 7
_ANSWERED = (None,) * 8

_TABLE_1: dict[str, Row] = {
    "GPT-4o+TP": (
        *(0.742, 0.746, 0.819, 0.784, 0.863, 0.611, 0.699),
        *(0.306, 0.684, 0.374, 0.697, 0.357, 0.776, 0.403, 0.692),
    ),
    "GPT-4o+IP": (
        *(0.788, 0.745, 0.854, 0.751, 0.784, 0.594, 0.658),
        *(0.309, 0.787, 0.382, 0.672, 0.376, 0.804, 0.381, 0.796),
    ),
    "Real Images": (*_DRAWN, None, 0.833, *(None,) * 6),
    "Yo'LLaVA": (0.921, 0.327, 0.529, 0.616, 0.625, 0.614, 0.594, *_ANSWERED),
    "MC-LLaVA": (0.924, 0.297, 0.511, 0.623, 0.636, 0.606, 0.583, *_ANSWERED),
    "RAP-MLLM": (0.936, 0.332, 0.595, 0.624, 0.617, 0.712, 0.723, *_ANSWERED),
    "Qwen2.5-VL+TP": (0.669, 0.218, 0.341, 0.404, 0.726, 0.579, 0.770, *_ANSWERED),
    "Yo'LLaVA(Phi-1.5)": (0.769, 0.225, 0.484, 0.493, 0.493, 0.511, 0.498, *_ANSWERED),
    "Text inversion": (*_DRAWN, 0.248, 0.632, 0.322, 0.538, 0.294, 0.673, 0.351, 0.633),
    "DreamBooth (SD)": (*_DRAWN, 0.282, 0.645, 0.323, 0.558, 0.313, 0.661, 0.367, 0.651),
    "Chameleon+TP": (
        *(0.685, 0.206, 0.313, 0.411, 0.489, 0.509, 0.560),
        *(0.186, 0.542, 0.281, 0.463, 0.193, 0.516, 0.309, 0.549),
    ),
    "Chameleon+IP": (
        *(0.497, 0.216, 0.374, 0.446, 0.497, 0.411, 0.532),
        *(0.165, 0.514, 0.266, 0.449, 0.190, 0.532, 0.299, 0.503),
    ),
    "Show-o+TP": (
        *(0.562, 0.217, 0.337, 0.462, 0.412, 0.507, 0.579),
        *(0.263, 0.663, 0.299, 0.558, 0.235, 0.679, 0.341, 0.660),
    ),
    "Yo'Chameleon": (
        *(0.764, 0.231, 0.399, 0.470, 0.511, 0.506, 0.582),
        *(0.235, 0.697, 0.289, 0.601, 0.273, 0.704, 0.321, 0.702),
    ),
    "UniCTokens": (
        *(0.792, 0.238, 0.385, 0.505, 0.521, 0.546, 0.601),
        *(0.280, 0.750, 0.298, 0.639, 0.282, 0.762, 0.317, 0.712),
    ),
    "UniCTokens-R1": (
        *(0.859, 0.250, 0.503, 0.592, 0.606, 0.604, 0.652),
        *(0.308, 0.765, 0.337, 0.645, 0.324, 0.801, 0.353, 0.756),
    ),
}

NUMBERS: dict[str, dict[str, Row]] = {
    "table1": _TABLE_1,
    "table2": {
        "w/o Und. Rea.": (
            *(0.808, 0.224, 0.427, 0.511, 0.519, 0.549, 0.621),
            *(0.301, 0.762, 0.323, 0.637, 0.289, 0.765, 0.321, 0.727),
        ),
        "w/o VIA": (
            *(0.823, 0.239, 0.489, 0.587, 0.591, 0.571, 0.626),
            *(0.299, 0.759, 0.306, 0.641, 0.301, 0.799, 0.343, 0.741),
        ),
        "w/o TIA": (
            *(0.855, 0.222, 0.431, 0.572, 0.588, 0.597, 0.646),
            *(0.305, 0.757, 0.319, 0.639, 0.291, 0.773, 0.329, 0.728),
        ),
        "w/o DSOG": (
            *(0.848, 0.243, 0.498, 0.590, 0.583, 0.607, 0.643),
            *(0.305, 0.766, 0.331, 0.632, 0.307, 0.796, 0.338, 0.739),
        ),
        "UniCTokens-R1": _TABLE_1["UniCTokens-R1"],
    },
    "table3": {
        "joint": (
            *(0.712, 0.224, 0.387, 0.489, 0.482, 0.529, 0.577),
            *(0.264, 0.680, 0.261, 0.607, 0.266, 0.724, 0.288, 0.653),
        ),
        "joint + UniCTask-GRPO": (
            *(0.789, 0.231, 0.468, 0.548, 0.557, 0.581, 0.629),
            *(0.287, 0.695, 0.291, 0.616, 0.303, 0.757, 0.322, 0.689),
        ),
        "UniCTokens": _TABLE_1["UniCTokens"],
        "UniCTokens-R1": _TABLE_1["UniCTokens-R1"],
    },
    "yollava": {
        "LLaVA+TP": (0.807, 0.921, 0.815, None),
        "Yo'LLaVA": (0.932, 0.918, 0.897, None),
        "MC-LLaVA": (0.953, 0.935, 0.924, None),
        "Qwen2.5-VL+TP": (0.685, 0.861, 0.697, None),
        "Yo'LLaVA(Phi-1.5)": (0.805, 0.627, 0.713, None),
        "DreamBooth (SD)": (None, None, None, 0.788),
        "Text inversion": (None, None, None, 0.632),
        "Chameleon+TP": (0.715, 0.537, 0.702, 0.579),
        "Chameleon+IP": (None, None, None, 0.499),
        "Show-o+TP": (0.704, 0.526, 0.605, 0.652),
        "Yo'Chameleon": (0.832, 0.591, 0.734, None),
        "UniCTokens": (0.865, 0.602, 0.725, None),
        "UniCTokens-R1": (0.926, 0.663, 0.737, 0.822),
    },
    "mcllava": {
        "LLaVA+TP": (0.608, 0.412, 0.609),
        "Yo'LLaVA": (0.829, 0.657, 0.691),
        "MC-LLaVA": (0.901, 0.692, 0.736),
        "Qwen2.5-VL+TP": (0.634, 0.436, 0.549),
        "Yo'LLaVA(Phi-1.5)": (0.726, 0.525, 0.591),
        "Chameleon+TP": (0.649, 0.408, 0.675),
        "Show-o+TP": (0.589, 0.574, 0.482),
        "Yo'Chameleon": (0.753, 0.610, 0.658),
        "UniCTokens": (0.742, 0.617, 0.692),
        "UniCTokens-R1": (0.773, 0.671, 0.704),
    },
    "dreambench": {
        "DreamBooth (SD)": (0.815, 0.293),
        "Text inversion": (0.675, 0.284),
        "Chameleon+TP": (0.612, 0.168),
        "Chameleon+IP": (0.594, 0.171),
        "Show-o+TP": (0.678, 0.235),
        "UniCTokens-R1": (0.808, 0.323),
    },
}
"""``NUMBERS[table][row]``."""


def number(table: str, row: str, key: str) -> float | None:
    """What the paper prints for a measure (``task.metric``) of a row; None where it prints nothing."""
    values = NUMBERS[table].get(row)
    layout = table if table in TABLES else "unify"
    places = {column.key: place for place, column in enumerate(TABLES[layout])}
    return None if values is None or key not in places else values[places[key]]
