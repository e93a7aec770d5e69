"""The command line, `cim`: modules that parse arguments and call the package."""
