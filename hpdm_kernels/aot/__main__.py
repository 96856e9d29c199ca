"""``python -m hpdm_kernels.aot``; see :mod:`hpdm_kernels.aot.compile`."""

import sys

from hpdm_kernels.aot.compile import main

sys.exit(main())
