"""Gluon refuses to be imported where kernels are interpreted, unless the emulator does it first."""

import tests.kernels.gluon.emulator  # noqa: F401
