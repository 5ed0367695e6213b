"""Pictures: brain scans, loss curves, and the figures of experiments. The only package that imports matplotlib."""

from ncn.plot.curves import compare_curves, loss_curve, published_curve
from ncn.plot.scan import brain_scan
from ncn.plot.style import Point, png

__all__ = ["Point", "brain_scan", "compare_curves", "loss_curve", "png", "published_curve"]
