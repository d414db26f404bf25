"""What holds for every test: ranks are never promoted silently, no key is used twice, and programs compile quickly."""

import functools
import os
import signal

import jaxlib
import pytest

# Most of a test's time is compilation, and XLA's fusion emitters treble it. Later releases cannot do without them, and
# XLA aborts on a flag that it does not know. XLA reads its flags when it starts.
if jaxlib.version.__version_info__ < (0, 11):
    _QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{_QUICK} {os.environ.get('XLA_FLAGS', '')}"
    # JAX 0.12 uses an MLIR context for ten programs. Earlier releases make one for each program, which takes most of
    # the time of lowering a small program. Here all programs share one. JAX has no public option for it.
    from jax._src.interpreters import mlir

    mlir.make_ir_context = functools.cache(mlir.make_ir_context)

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session", autouse=True)
def _compilation_cache(tmp_path_factory):
    """Keeps compiled programs, for the tests that build the same ones again."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compilation_cache")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@pytest.fixture
def optimized():
    """Gives the options of `jax.jit` that compile as for a user: for tests of what a program takes."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield {"xla_cpu_use_fusion_emitters": True} if "fusion_emitters" in os.environ.get("XLA_FLAGS", "") else {}
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def interruptions():
    """Ctrl-C has its effect here and in processes that the test starts. A shell's background command ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
