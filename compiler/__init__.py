"""The compiler: graph, passes, schedule, scheduler, bounds, cost model."""
