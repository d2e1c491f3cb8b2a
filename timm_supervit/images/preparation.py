"""Whether images can be prepared as a file says. Files are written by hand, by other programs, or to do harm."""
import math
from collections.abc import Mapping, Sequence
from typing import Any

from timm.data.transforms import str_to_interp_mode

from ..subnets import check_img_size, size_2d


def check_preparation(config: Mapping[str, Any]) -> None:
    """Raise a ValueError if images cannot be prepared as a configuration of timm says, or only with more memory than
    images take.

    Args:
        config: With input_size, crop_pct, crop_mode, interpolation, mean and std, as ``resolve_data_config`` returns.
    """
    size, crop_pct = size_2d(check_img_size(config['input_size'][1:])), config['crop_pct']
    if not (_is_number(crop_pct) and crop_pct > 0):
        raise ValueError(f'crop_pct {crop_pct!r} is no number above 0, as in 0.875')
    check_img_size([max(1, math.floor(min(side / crop_pct, 1e9))) for side in size])  # what is cut out of
    if config['crop_mode'] not in ('center', 'squash', 'border'):
        raise ValueError(f'crop_mode {config["crop_mode"]!r} is unknown; use center, squash or border')
    try:
        if config['interpolation'] != 'random':
            str_to_interp_mode(config['interpolation'])
    except (KeyError, TypeError) as error:
        raise ValueError(f'interpolation {config["interpolation"]!r} is unknown; use bilinear or bicubic') from error
    for key in ('mean', 'std'):
        values = config[key]
        if not isinstance(values, Sequence) or not values or not all(
                _is_number(value) and (value > 0 or key == 'mean') for value in values):
            raise ValueError(f'{key} {values!r} is no list of a number for each channel, as in [0.5, 0.5, 0.5]')


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e9 < value < 1e9
