"""Another import path of halfstep.mixed_precision, for programs that were written against it."""

from halfstep.mixed_precision import __all__ as __all__
from halfstep.mixed_precision import __dir__ as __dir__
from halfstep.mixed_precision import __getattr__ as __getattr__
