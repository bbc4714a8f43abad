from tests.data.conftest import hub, server  # noqa: F401
