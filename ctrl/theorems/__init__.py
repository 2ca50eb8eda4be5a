"""The theorems of the paper, one file each: statement, exact twin, Monte Carlo twin, limit and planted errors."""

from __future__ import annotations

from ctrl.theorems.verdict import Case as Case
from ctrl.theorems.verdict import Theorem as Theorem
from ctrl.theorems.verdict import Verdict as Verdict
