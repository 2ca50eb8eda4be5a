r"""The yardstick for fine-tuning images: the best objective that exists, from samples of the pre-trained model alone (`ctrl.exact.tilt`)."""

from __future__ import annotations

from ctrl.exact.tilt import Yardstick as Yardstick
from ctrl.exact.tilt import average as average
from ctrl.exact.tilt import ideal_frontier as ideal_frontier
from ctrl.exact.tilt import yardstick as yardstick
