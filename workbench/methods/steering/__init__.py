"""Where to push and whom: pairs, targets, gates, controllers, clusters, attribution, side effects, the results."""
