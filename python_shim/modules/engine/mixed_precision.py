"""The import path of the user's document; everything is halfstep.mixed_precision."""

from halfstep.mixed_precision import *  # noqa: F403
from halfstep.mixed_precision import __all__ as __all__
