"""The last module that the server of :mod:`helpers.launch` loads before it forks ranks.

What DeepSpeed asks the compiler and the libraries of the machine once a process, the ranks inherit.
"""

import gc

from rxt_dist.parallel.bootstrap import configure_deepspeed

configure_deepspeed()
# A collection in a rank would touch, and so copy, every page that it shares with the server.
gc.collect()
gc.freeze()
