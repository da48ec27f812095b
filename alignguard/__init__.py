"""Fine-tuning that keeps what alignment put in."""
