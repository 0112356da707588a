"""Python runs this at its start: a process of a test gets the GPUs that its environment speaks of."""

from tests.cuda_stand_in import install_from_environment

install_from_environment()
