//! Plans what a reload does with the sockets for HAProxy's agent check.

use super::plan::{bind_when_free, has_any_port, not_inherited, own_listener};
use super::{RunningConfig, refused};
use crate::api::command::CommandError;
use crate::config::{Address, Config, ListenerOptions};
use crate::listen::bind::Listening;
use crate::listen::error::RunError;

/// What happens to the agent of one pool.
#[derive(Debug)]
pub(crate) struct AgentPlan {
    pub(crate) pool: String,
    pub(crate) address: Address,
    pub(crate) step: AgentStep,
}

/// How a pool gets the socket of its agent.
#[derive(Debug)]
pub(crate) enum AgentStep {
    /// It is open already, for the pool of this name.
    Keep { was: String },
    /// It is new.
    Open(Vec<Listening>),
    /// A service manager has passed it under this name, and nothing uses it.
    TakeKept(String),
}

/// The plan for all pools. Binds new sockets, so it comes last.
pub(super) fn plan_agents(
    now: &RunningConfig,
    new: &Config,
) -> Result<Vec<AgentPlan>, CommandError> {
    let running = now.pools.iter().filter_map(|id| now.config.pools.get(usize::from(id.0)));
    let mut open: Vec<(&str, &Address)> = running
        .filter_map(|pool| Some((&*pool.settings.name, pool.agent_listen.as_ref()?)))
        .collect();
    let wanted: Vec<(&str, &Address)> = new
        .pools
        .iter()
        .filter_map(|pool| Some((&*pool.settings.name, pool.agent_listen.as_ref()?)))
        .collect();
    // By name first: several agents may have the same address, with port 0.
    let mut take = |same: &dyn Fn(&(&str, &Address)) -> bool| {
        let at = open.iter().position(same)?;
        Some(open.remove(at).0.to_owned())
    };
    let mut kept: Vec<Option<String>> =
        wanted.iter().map(|pool| take(&|(name, at)| (*name, *at) == *pool)).collect();
    for (kept, (_, address)) in kept.iter_mut().zip(&wanted) {
        if kept.is_none() && !has_any_port(address) {
            *kept = take(&|(_, at)| at == address);
        }
    }
    let mut plan = Vec::with_capacity(wanted.len());
    for ((pool, address), kept) in wanted.into_iter().zip(kept) {
        let step = match (kept, address) {
            (Some(was), _) => AgentStep::Keep { was },
            (None, Address::Systemd(name)) if now.kept.contains(name) => {
                AgentStep::TakeKept(name.clone())
            }
            (None, Address::Systemd(name)) => {
                return Err(not_inherited(&format!("pool `{pool}`"), name));
            }
            (None, Address::Tcp(_) | Address::Unix(_)) => {
                let options = ListenerOptions::default();
                let made = bind_when_free(now, address, &options);
                AgentStep::Open(made.map_err(|error| not_opened(now, pool, address, &error))?)
            }
        };
        plan.push(AgentPlan { pool: pool.to_owned(), address: address.clone(), step });
    }
    Ok(plan)
}

fn not_opened(
    now: &RunningConfig,
    pool: &str,
    address: &Address,
    error: &RunError,
) -> CommandError {
    if let (true, Address::Tcp(tcp)) = (error.is_in_use(), address)
        && let Some(own) = own_listener(now, *tcp)
    {
        return refused(format!(
            "agent of pool `{pool}`: cannot listen on {address}: this dispatcher itself listens \
             there, as {own}"
        ))
        .hint(
            "nothing was changed; a new socket is opened before old ones are closed: take the old one \
             out first, reload, and put the new one in with a second reload",
        );
    }
    refused(format!("agent of pool `{pool}`: {error}")).hint("nothing was changed")
}
