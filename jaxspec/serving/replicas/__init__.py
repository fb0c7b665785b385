"""Many engines behind one address, as Ray Serve deployments: replicas that answer, and a front that picks one."""
