"""Settings for all tests."""

pytest_plugins = ["hub_fixtures"]
