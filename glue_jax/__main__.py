"""`python -m glue_jax` is the command `glue-jax`."""

from glue_jax.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
