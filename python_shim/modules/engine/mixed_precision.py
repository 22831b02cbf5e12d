"""Another import path of halfstep.mixed_precision, for programs that were written against it."""

from halfstep.mixed_precision import *  # noqa: F403
from halfstep.mixed_precision import __all__ as __all__
