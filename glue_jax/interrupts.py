"""`interruptible`: no Ctrl-C is lost in a command."""

import _thread
import contextlib
import sys
import threading
from collections.abc import Iterator

# Seconds until an ignored interruption comes again.
_SOON = 0.05


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raises a KeyboardInterrupt again if Python ignored it.

    Python ignores an exception that is raised while it collects garbage, where JAX has a callback. A Ctrl-C at this
    moment would have no effect.
    """
    hook = sys.unraisablehook

    def again(unraisable: "sys.UnraisableHookArgs") -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            # Raised here, it would be ignored again.
            again_soon = threading.Timer(_SOON, _thread.interrupt_main)
            again_soon.daemon = True
            again_soon.start()
        else:
            hook(unraisable)

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = hook
