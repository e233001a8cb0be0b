"""The table: each public function has a row, or several. The laws in test_*.py hold for every row.

To test a new function, add a row.
"""

from __future__ import annotations

import pytest

from tests.kernels.kernel import LOGIT, label
from tests.kernels.of_heads import HEADS
from tests.kernels.of_logits import ROWS_OF_LOGITS
from tests.kernels.of_probabilities import ROWS_OF_PROBABILITIES

TABLE = ROWS_OF_PROBABILITIES + ROWS_OF_LOGITS
KERNELS = TABLE + HEADS
ROWS = {label(kernel): kernel for kernel in TABLE}

each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=label)
each_function = pytest.mark.parametrize("kernel", TABLE, ids=label)
WITH_CLASSES = [kernel for kernel in TABLE if kernel.has_classes]
each_with_classes = pytest.mark.parametrize("kernel", WITH_CLASSES, ids=label)
OF_LOGITS = [kernel for kernel in WITH_CLASSES if LOGIT in kernel.domains]
each_of_logits = pytest.mark.parametrize("kernel", OF_LOGITS, ids=label)
