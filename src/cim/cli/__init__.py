"""The command line, `cim`: a module for each command, which parses arguments and calls the package."""
