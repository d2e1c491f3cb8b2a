"""``python -m timm_supervit`` is the command ``supervit``."""
from .interrupts import leave_when_interrupted


def run() -> None:
    """Run the command ``supervit``, which signals can end from here on."""
    leave_when_interrupted()
    from .cli import main

    main(prog_name='supervit')


if __name__ == '__main__':
    run()
