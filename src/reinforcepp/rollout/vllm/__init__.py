"""Everything that names vLLM: in-process engine, servers, weight transfer."""
