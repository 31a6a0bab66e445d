-- From version 1 to 2: the journal of channels whose readers fetch what is said.

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
