"""What training with a method costs, estimated on tensors without data before anything is trained."""

from .estimate import OPTIMIZER_STATES, CostEstimate, estimate_cost, estimate_costs, largest_batch


__all__ = ["OPTIMIZER_STATES", "CostEstimate", "estimate_cost", "estimate_costs", "largest_batch"]
