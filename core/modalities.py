"""The seven modalities, their fixed order, and the pixel statistics used to normalise each.

The order is part of the wire: an index means the same modality at every site and in every study.
Means and deviations are the published values of MerMED-FM (arXiv 2507.00185), RGB in [0, 1].
"""

from typing import Final

MODALITIES: Final = ("ct", "cxr", "us", "pathology", "cfp", "oct", "dermatology")

MEAN_STD: Final[dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]]] = {
    "ct": ((0.3301,) * 3, (0.3252,) * 3),
    "cxr": ((0.5076,) * 3, (0.3122,) * 3),
    "us": ((0.1469,) * 3, (0.1806,) * 3),
    "pathology": ((0.7214, 0.6050, 0.7054), (0.2486, 0.2714, 0.2457)),
    "cfp": ((0.3378, 0.2133, 0.1329), (0.2964, 0.1900, 0.1393)),
    "oct": ((0.1983,) * 3, (0.2217,) * 3),
    "dermatology": ((0.6614, 0.5189, 0.4715), (0.2396, 0.2199, 0.2286)),
}

TITLES: Final[dict[str, str]] = {
    "ct": "CT",
    "cxr": "chest X-ray",
    "us": "ultrasound",
    "pathology": "pathology",
    "cfp": "colour fundus",
    "oct": "OCT",
    "dermatology": "dermatology",
}
