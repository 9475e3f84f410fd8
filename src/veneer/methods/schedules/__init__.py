"""What methods do around the steps of an optimiser; imported when an adapter with a schedule is attached."""
