-- The whole state of a gateway. Times are microseconds since 1970 (UTC), JSON is UTF-8 text.
-- The partial indexes hold only what is open: boot and every statement on the way of a message
-- cost what is open, not what is stored.

-- One row: who this store is. Keys of replies and steps begin with its id.
CREATE TABLE store (
    id          TEXT NOT NULL,
    created_at  INTEGER NOT NULL
) STRICT;

-- One life of one gateway process. seen_at is when it last wrote: the best answer to "when did
-- it die?". machine and seen_up (a clock that nobody sets) survive a wall clock that jumps.
CREATE TABLE epoch (
    id          INTEGER PRIMARY KEY,
    pid         INTEGER NOT NULL,
    machine     TEXT NOT NULL,
    started_at  INTEGER NOT NULL,
    seen_at     INTEGER NOT NULL,
    seen_up     INTEGER NOT NULL,
    ended_at    INTEGER,
    ending      TEXT
) STRICT;

-- A channel's place in its platform's stream, committed with the messages that it covers.
CREATE TABLE cursor (
    channel     TEXT PRIMARY KEY,
    value       TEXT NOT NULL,
    at          INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- One conversation. /new counts `conversation` up; history is read within one number.
CREATE TABLE session (
    id           INTEGER PRIMARY KEY,
    channel      TEXT NOT NULL,
    name         TEXT NOT NULL,
    conversation INTEGER NOT NULL DEFAULT 0,
    UNIQUE (channel, name)
) STRICT;

-- What somebody sent. seq is the order of acceptance. state: queued, running, then one end:
-- answered, failed, stopped, quarantined, expired. body is {"text", "sender"}; NULL once forgotten.
-- traceparent (W3C) is the trace that its turn goes on in, in whichever process.
CREATE TABLE message (
    seq          INTEGER PRIMARY KEY,
    channel      TEXT NOT NULL,
    id           TEXT NOT NULL,
    session      INTEGER NOT NULL REFERENCES session (id),
    conversation INTEGER NOT NULL,
    state        TEXT NOT NULL,
    turn         INTEGER,
    body         TEXT,
    accepted_at  INTEGER NOT NULL,
    ended_at     INTEGER,
    error        TEXT,
    traceparent  TEXT,
    UNIQUE (channel, id)
) STRICT;
CREATE INDEX message_queued ON message (session, seq) WHERE state = 'queued';
CREATE INDEX message_session ON message (session, seq);
CREATE INDEX message_turn ON message (turn) WHERE turn IS NOT NULL;

-- One answer by the agent: the marker, and what a resumed attempt needs.
CREATE TABLE turn (
    id            INTEGER PRIMARY KEY,
    session       INTEGER NOT NULL REFERENCES session (id),
    conversation  INTEGER NOT NULL,
    state         TEXT NOT NULL,
    attempt       INTEGER NOT NULL DEFAULT 1,
    epoch         INTEGER NOT NULL,
    reason        TEXT,
    crashes       INTEGER NOT NULL DEFAULT 0,
    interruptions INTEGER NOT NULL DEFAULT 0,
    begun_at      INTEGER NOT NULL,
    attempt_at    INTEGER NOT NULL,
    marked_at     INTEGER,
    marked_up     INTEGER,
    settled_at    INTEGER,
    restart_asked INTEGER NOT NULL DEFAULT 0,
    retry_of      INTEGER,
    checkpoint    TEXT,
    error         TEXT
) STRICT;
-- Unique: a session has at most one open turn, whatever the code above believes (promise 2). A turn
-- is open until it is settled; said by settled_at and not by state, because marking changes the
-- state of every open turn at once, and need not touch the index then.
CREATE UNIQUE INDEX turn_open ON turn (session) WHERE settled_at IS NULL;
CREATE INDEX turn_quarantined ON turn (id) WHERE state = 'QUARANTINED';

-- The attempts of a turn that did not settle it: written when the next one begins.
CREATE TABLE attempt (
    turn           INTEGER NOT NULL,
    attempt        INTEGER NOT NULL,
    epoch          INTEGER NOT NULL,
    began_at       INTEGER NOT NULL,
    interrupted_at INTEGER NOT NULL,
    reason         TEXT NOT NULL,
    PRIMARY KEY (turn, attempt)
) STRICT, WITHOUT ROWID;

-- A remembered step. state: begun (only unsafe ones, before they run), done.
CREATE TABLE step (
    turn        INTEGER NOT NULL,
    name        TEXT NOT NULL,
    state       TEXT NOT NULL,
    effect      TEXT NOT NULL,
    result      TEXT,
    attempt     INTEGER NOT NULL,
    began_at    INTEGER NOT NULL,
    done_at     INTEGER,
    PRIMARY KEY (turn, name)
) STRICT, WITHOUT ROWID;

-- The outbox: one reply, or one part of a long one. state: pending, sending (only where the
-- platform has no idempotent send), then delivered, dead or dropped. about: the message ids
-- that it answers, as JSON.
CREATE TABLE delivery (
    id           INTEGER PRIMARY KEY,
    key          TEXT NOT NULL UNIQUE,
    session      INTEGER NOT NULL REFERENCES session (id),
    turn         INTEGER,
    n            INTEGER NOT NULL,
    part         INTEGER NOT NULL,
    parts        INTEGER NOT NULL,
    kind         TEXT NOT NULL,
    about        TEXT NOT NULL,
    text         TEXT,
    attempt      INTEGER NOT NULL,
    final        INTEGER NOT NULL,
    repeat       INTEGER NOT NULL DEFAULT 0,
    state        TEXT NOT NULL,
    tries        INTEGER NOT NULL DEFAULT 0,
    not_before   INTEGER,
    error        TEXT,
    epoch        INTEGER NOT NULL,
    created_at   INTEGER NOT NULL,
    delivered_at INTEGER,
    traceparent  TEXT
) STRICT;
CREATE INDEX delivery_open ON delivery (id) WHERE state IN ('pending', 'sending');
CREATE INDEX delivery_dead ON delivery (id) WHERE state = 'dead';
CREATE INDEX delivery_turn ON delivery (turn) WHERE turn IS NOT NULL;
CREATE INDEX delivery_loose ON delivery (created_at) WHERE turn IS NULL;

-- Channels whose readers fetch what is said (HTTP): what happens in their sessions is journaled.
CREATE TABLE pulled (
    channel TEXT PRIMARY KEY
) STRICT, WITHOUT ROWID;

-- What happened in the sessions of these channels, in the order of the commits: what a reader who
-- comes back is told from where it left. Written by the triggers below, in the transaction of the
-- change itself, whoever makes it; only drafts (the growing text of a reply) are put there by a
-- verb. Rows are never changed, and seq is never given twice: the newest row is not forgotten.
CREATE TABLE journal (
    seq      INTEGER PRIMARY KEY,
    session  INTEGER NOT NULL,
    at       INTEGER NOT NULL,
    what     TEXT NOT NULL,
    message  INTEGER,
    turn     INTEGER,
    attempt  INTEGER,
    delivery INTEGER,
    detail   TEXT
) STRICT;
CREATE INDEX journal_session ON journal (session, seq);
CREATE INDEX journal_message ON journal (message) WHERE message IS NOT NULL;

CREATE TRIGGER journal_accepted AFTER INSERT ON message
WHEN EXISTS (SELECT 1 FROM session JOIN pulled ON pulled.channel = session.channel
             WHERE session.id = NEW.session)
BEGIN
    INSERT INTO journal (session, at, what, message)
    VALUES (NEW.session, NEW.accepted_at, 'accepted', NEW.seq);
END;

-- A message has reached its end, or waits once more.
CREATE TRIGGER journal_settled AFTER UPDATE OF state ON message
WHEN OLD.state != NEW.state AND NEW.state != 'running'
     AND EXISTS (SELECT 1 FROM session JOIN pulled ON pulled.channel = session.channel
                 WHERE session.id = NEW.session)
BEGIN
    INSERT INTO journal (session, at, what, message, turn, detail)
    VALUES (NEW.session, coalesce(NEW.ended_at, OLD.ended_at, NEW.accepted_at),
            iif(NEW.state = 'queued', 'requeued', 'settled'), NEW.seq, NEW.turn, NEW.state);
END;

CREATE TRIGGER journal_begun AFTER INSERT ON turn
WHEN EXISTS (SELECT 1 FROM session JOIN pulled ON pulled.channel = session.channel
             WHERE session.id = NEW.session)
BEGIN
    INSERT INTO journal (session, at, what, turn, attempt)
    VALUES (NEW.session, NEW.begun_at, 'begun', NEW.id, NEW.attempt);
END;

CREATE TRIGGER journal_interrupted AFTER UPDATE OF state ON turn
WHEN OLD.state != NEW.state AND NEW.state IN ('RUNNING', 'RESUME_PENDING')
     AND EXISTS (SELECT 1 FROM session JOIN pulled ON pulled.channel = session.channel
                 WHERE session.id = NEW.session)
BEGIN
    INSERT INTO journal (session, at, what, turn, attempt, detail)
    VALUES (NEW.session,
            iif(NEW.state = 'RUNNING', NEW.attempt_at, coalesce(NEW.marked_at, NEW.attempt_at)),
            iif(NEW.state = 'RUNNING', 'resumed', 'interrupted'), NEW.id, NEW.attempt,
            coalesce(NEW.reason, OLD.reason));
END;

CREATE TRIGGER journal_reply AFTER INSERT ON delivery
WHEN EXISTS (SELECT 1 FROM session JOIN pulled ON pulled.channel = session.channel
             WHERE session.id = NEW.session)
BEGIN
    INSERT INTO journal (session, at, what, turn, attempt, delivery)
    VALUES (NEW.session, NEW.created_at, 'reply', NEW.turn, NEW.attempt, NEW.id);
END;
