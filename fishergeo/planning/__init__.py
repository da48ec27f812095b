"""What an estimate will cost in time and memory, before it runs."""

from fishergeo.planning.plans import LayerPlan, Plan, plan

__all__ = ["LayerPlan", "Plan", "plan"]
