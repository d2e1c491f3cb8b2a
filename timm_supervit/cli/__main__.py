"""``python -m timm_supervit.cli`` is the command ``supervit``."""
from . import main

main(prog_name='supervit')
