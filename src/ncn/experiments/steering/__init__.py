"""`ncn steer`: does a slider move what it is named after, how much else does it move, and what does it cost?"""

from ncn.experiments.steering.run import Steering, steer

__all__ = ["Steering", "steer"]
