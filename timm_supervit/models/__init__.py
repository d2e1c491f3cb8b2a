"""The networks: token keeping, the reading of weights, and one file for each backbone, as in timm."""
# First of all, and for every file in this package: the post-import hook on timm.models imports them, and would find one
# half imported if that file had brought in timm itself.
import timm.models  # noqa: F401
