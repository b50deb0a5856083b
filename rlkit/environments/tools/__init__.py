"""Tools included in the package, and the environment that offers them: `environment=tools`."""
