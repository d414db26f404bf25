"""`python -m glue_jax` is the command `glue-jax`."""

from glue_jax.cli import command

if __name__ == "__main__":
    command()
