"""The subcommands of `regard` that compute: `explain` and `bench`."""
