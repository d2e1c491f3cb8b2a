"""``python -m timm_supervit`` is the command ``supervit``."""
from .cli import main

main(prog_name='supervit')
