"""One function per hot operation, with its backends; a backend is chosen once, when the program starts."""
