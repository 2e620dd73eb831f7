"""The HTTP server. Protocol files translate; `worker` owns the engine; `app` joins them."""
