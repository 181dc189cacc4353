"""The tables of the database and how an older file becomes a current one.

A migration is never edited once released: a new one is added and file.SCHEMA_VERSION raised by one.
"""

from sqlite_utils import Database, Migrations

from .file import APPLICATION_ID, SCHEMA_VERSION

migrations = Migrations("patune")


@migrations()
def m001_tables(db: Database) -> None:
    # STRICT refuses what SQLite would else store silently in the wrong type, such as a numpy scalar as a BLOB.
    db.execute("""
        CREATE TABLE environments (
            id INTEGER PRIMARY KEY,
            gpu TEXT NOT NULL,
            sm_count INTEGER NOT NULL,
            capability TEXT NOT NULL,
            driver TEXT NOT NULL,
            triton TEXT NOT NULL,
            torch TEXT NOT NULL,
            UNIQUE (gpu, sm_count, capability, driver, triton, torch)
        ) STRICT""")
    db.execute("""
        CREATE TABLE keys (
            id INTEGER PRIMARY KEY,
            kernel TEXT NOT NULL,
            gpu TEXT NOT NULL,
            sm_count INTEGER NOT NULL,
            head_dim INTEGER NOT NULL,
            page_size INTEGER NOT NULL,
            q_heads_per_kv INTEGER NOT NULL,
            q_dtype TEXT NOT NULL,
            kv_dtype TEXT NOT NULL,
            features TEXT NOT NULL,
            UNIQUE (kernel, gpu, sm_count, head_dim, page_size, q_heads_per_kv, q_dtype, kv_dtype, features)
        ) STRICT""")
    db.execute("""
        CREATE TABLE workloads (
            id INTEGER PRIMARY KEY,
            batch_size INTEGER NOT NULL,
            kv_len INTEGER NOT NULL,
            q_len INTEGER NOT NULL,
            kv_heads INTEGER NOT NULL,
            ragged INTEGER NOT NULL CHECK (ragged IN (0, 1)),
            UNIQUE (batch_size, kv_len, q_len, kv_heads, ragged)
        ) STRICT""")
    db.execute("""
        CREATE TABLE trials (
            id INTEGER PRIMARY KEY,
            key_id INTEGER NOT NULL REFERENCES keys (id),
            workload_id INTEGER NOT NULL REFERENCES workloads (id),
            environment_id INTEGER NOT NULL REFERENCES environments (id),
            config TEXT NOT NULL CHECK (json_valid(config)),
            status TEXT NOT NULL,
            us REAL,
            samples_us TEXT NOT NULL CHECK (json_valid(samples_us)),
            error REAL,
            message TEXT NOT NULL,
            source_hash TEXT NOT NULL,
            mode TEXT NOT NULL CHECK (mode IN ('measured', 'replay')),
            measured_at TEXT NOT NULL
        ) STRICT""")
    db.execute("CREATE INDEX trials_of ON trials (key_id, workload_id)")
    db.execute("""
        CREATE TABLE configs (
            key_id INTEGER NOT NULL REFERENCES keys (id),
            workload_id INTEGER NOT NULL REFERENCES workloads (id),
            trial_id INTEGER NOT NULL REFERENCES trials (id),
            default_us REAL,
            evaluations INTEGER NOT NULL,
            mode TEXT NOT NULL CHECK (mode IN ('measured', 'replay')),
            optimum_us REAL,
            PRIMARY KEY (key_id, workload_id)
        ) STRICT, WITHOUT ROWID""")


def migrate(db: Database) -> None:
    """Bring an empty or older database up to date. The caller holds the write lock: two first starts may coincide."""
    migrations.apply(db)
    # Also where nothing changes: SQLite grants the write lock on a read-only file, only a write tells.
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
