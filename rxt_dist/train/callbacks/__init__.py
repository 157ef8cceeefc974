"""What listens to the training loop; the loop itself knows none of it."""

from rxt_dist.train.callbacks.base import Callback, CallbackList
from rxt_dist.train.callbacks.metrics_log import MetricsLog
from rxt_dist.train.callbacks.progress import ProgressBar
from rxt_dist.train.callbacks.prometheus import PrometheusCallback

__all__ = ["Callback", "CallbackList", "MetricsLog", "ProgressBar", "PrometheusCallback"]
