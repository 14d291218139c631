//! A connection that is made when it is needed, and given up when it does not answer.
//!
//! Unlike [`super::link`], which keeps one up for what is asked thousands of times a second, this one is for a few calls
//! that each may say that Redis is away. While it is, attempts are made in the background and at growing intervals, and
//! nobody waits for them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use parking_lot::Mutex;
use redis::{ErrorKind, RedisError, RedisResult, ServerErrorKind};
use tokio::time::{timeout, timeout_at};

use super::breaker::Backoff;
use super::connection::{Connection, Connector};

/// How long connecting may take, logging in and asking the sentinels included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

type Attempt = Shared<BoxFuture<'static, Result<Connection, String>>>;

/// Why a call has no answer.
#[derive(Debug)]
pub enum Trouble {
    /// No connection, or no answer on it in time.
    Away,
    /// The server's answer is an error.
    Refused(RedisError),
}

/// At most one connection to an address.
pub struct Line {
    connector: Connector,
    /// What it is for, in the log.
    purpose: &'static str,
    /// Locked for moments, never over an await.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    connection: Slot,
    /// Counts attempts: what fails on an old connection says nothing of a new one.
    number: u64,
    backoff: Backoff,
    next_attempt: Option<Instant>,
    /// Why it is away, as the log was told; `None` while it is not.
    told: Option<String>,
}

#[derive(Default)]
enum Slot {
    #[default]
    Empty,
    Connecting(Attempt),
    Up(Connection, Instant),
}

impl Line {
    /// One that connects when it is first asked. Needs a tokio runtime from then on.
    pub fn new(connector: Connector, purpose: &'static str) -> Arc<Self> {
        Arc::new(Self { connector, purpose, state: Mutex::default() })
    }

    /// Whether there is a connection that has answered all it was asked.
    pub fn is_up(&self) -> bool {
        matches!(self.state.lock().connection, Slot::Up(..))
    }

    /// Makes a call that must be answered within `limit`. Others may share the connection.
    pub async fn ask<T, F>(self: &Arc<Self>, limit: Duration, call: impl FnOnce(Connection) -> F) -> Result<T, Trouble>
    where
        F: Future<Output = RedisResult<T>>,
    {
        self.ask_as(limit, call, |_| ()).await
    }

    /// The same on a connection that nobody shares. If the future is dropped before the answer is there, the connection is
    /// closed: the next call must not get, or wait for, what this one asked.
    pub async fn ask_alone<T, F>(
        self: &Arc<Self>,
        limit: Duration,
        call: impl FnOnce(Connection) -> F,
    ) -> Result<T, Trouble>
    where
        F: Future<Output = RedisResult<T>>,
    {
        self.ask_as(limit, call, |number| Unanswered { line: self, number }).await
    }

    async fn ask_as<T, F, G>(
        self: &Arc<Self>,
        limit: Duration,
        call: impl FnOnce(Connection) -> F,
        guard: impl FnOnce(u64) -> G,
    ) -> Result<T, Trouble>
    where
        F: Future<Output = RedisResult<T>>,
    {
        let until = Instant::now() + limit;
        let (connection, number) = self.connection(until).await.ok_or(Trouble::Away)?;
        let guard = guard(number);
        let answer = timeout_at(until.into(), call(connection)).await;
        std::mem::forget(guard);
        match answer {
            Ok(Ok(value)) => {
                self.answered();
                Ok(value)
            }
            Ok(Err(error)) if is_lost(&error) => {
                self.give_up(number, error.to_string());
                Err(Trouble::Away)
            }
            Ok(Err(error)) => {
                self.answered();
                Err(Trouble::Refused(error))
            }
            Err(_) => {
                self.give_up(number, format!("no answer within {limit:?}"));
                Err(Trouble::Away)
            }
        }
    }

    /// The connection and its number. While it is known to be away nobody waits for an attempt.
    async fn connection(self: &Arc<Self>, until: Instant) -> Option<(Connection, u64)> {
        let (attempt, number) = {
            let mut state = self.state.lock();
            let attempt = match &state.connection {
                Slot::Up(connection, _) => return Some((connection.clone(), state.number)),
                Slot::Connecting(attempt) => attempt.clone(),
                Slot::Empty if state.next_attempt.is_some_and(|at| at > Instant::now()) => return None,
                Slot::Empty => {
                    state.number += 1;
                    let attempt = self.clone().attempt(state.number);
                    state.connection = Slot::Connecting(attempt.clone());
                    attempt
                }
            };
            if state.told.is_some() {
                return None;
            }
            (attempt, state.number)
        };
        // An attempt that failed has said so itself.
        let connection = timeout_at(until.into(), attempt).await.ok()?.ok()?;
        Some((connection, number))
    }

    /// An attempt to connect, which goes on when nobody waits for it.
    fn attempt(self: Arc<Self>, number: u64) -> Attempt {
        let task = tokio::spawn(async move {
            let connected = match timeout(CONNECT_TIMEOUT, self.connector.connect()).await {
                Ok(connected) => connected.map_err(|e| e.to_string()),
                Err(_) => Err(format!("no connection within {CONNECT_TIMEOUT:?}")),
            };
            match &connected {
                Ok(connection) => self.connected(number, connection),
                Err(reason) => self.give_up(number, reason.clone()),
            }
            connected
        });
        async move { task.await.unwrap_or_else(|e| Err(format!("connecting ended early: {e}"))) }.boxed().shared()
    }

    fn connected(&self, number: u64, connection: &Connection) {
        let mut state = self.state.lock();
        if state.number == number {
            state.connection = Slot::Up(connection.clone(), Instant::now());
        }
    }

    /// A connection alone says little: one to a server that is halted can be made too.
    fn answered(&self) {
        if self.state.lock().told.take().is_some() {
            tracing::info!(address = %self.connector.address(), "Redis answers again");
        }
    }

    /// Closes the connection that did not answer, and puts the next attempt off.
    fn give_up(&self, number: u64, reason: String) {
        let mut state = self.state.lock();
        if state.number != number {
            return;
        }
        let held = match std::mem::take(&mut state.connection) {
            Slot::Empty => return,
            Slot::Connecting(_) => Duration::ZERO,
            Slot::Up(_, since) => since.elapsed(),
        };
        state.next_attempt = Some(Instant::now() + state.backoff.pause(held));
        if state.told.as_ref() != Some(&reason) {
            tracing::warn!(address = %self.connector.address(), reason, "Redis is away: {}", self.purpose);
            state.told = Some(reason);
        }
    }
}

/// Closes the connection if it is dropped, without saying anything against the server.
struct Unanswered<'a> {
    line: &'a Line,
    number: u64,
}

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        let mut state = self.line.state.lock();
        if state.number == self.number {
            state.connection = Slot::Empty;
        }
    }
}

/// Whether the connection is of no more use, or leads to a server that cannot serve now.
fn is_lost(error: &RedisError) -> bool {
    let cannot_serve = [
        ErrorKind::Server(ServerErrorKind::ReadOnly),
        ErrorKind::Server(ServerErrorKind::MasterDown),
        ErrorKind::Server(ServerErrorKind::BusyLoading),
        ErrorKind::ClusterConnectionNotFound,
    ];
    error.is_io_error()
        || error.is_timeout()
        || error.is_connection_dropped()
        || error.is_unrecoverable_error()
        || error.is_cluster_error()
        || cannot_serve.contains(&error.kind())
}
