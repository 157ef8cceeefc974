"""The subcommands of `rxt`, one module each: ``add_parser(commands)`` declares it, and what it does is
imported only when it runs."""
