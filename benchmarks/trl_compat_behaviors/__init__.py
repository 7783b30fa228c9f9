"""183 behaviors of TRL that its users rely on, as code that runs with TRL's classes and with ours."""
