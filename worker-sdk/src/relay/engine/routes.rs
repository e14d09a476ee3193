//! Routes: where the registration of an id is, and messages that wait to know.

use std::collections::VecDeque;
use std::sync::Arc;

use dispatch_protocol::relay::frame::flag;
use dispatch_protocol::relay::{Id, Location, ToDirectory};

use super::groups::{Fan, Kind};
use super::{Done, Engine, Outbound, Request, Verdict, What};
use crate::relay::Outcome;

/// One recipient.
pub(super) struct Route {
    state: State,
    /// Messages that wait for a look-up, in order, and their bytes.
    waiting: VecDeque<Outbound>,
    bytes: usize,
    /// Messages that did not find the recipient where it should have been; before the others.
    again: VecDeque<Outbound>,
    /// Messages on their way.
    in_flight: u32,
    /// The newest registration that was known; 0 for none. A directory that has just started may
    /// for a moment know only an older one: what goes there would be out of order.
    newest: u64,
    /// Whether that one has refused a message, so it has ended.
    ended: bool,
}

enum State {
    /// The directory is asked with the next message.
    Unknown,
    /// The directory was asked with this request.
    Asked(u64),
    Known(Vec<Location>),
    /// The place is in doubt; the directory is asked when no message is on its way any more.
    Stale,
}

impl Route {
    pub(super) fn waits(&self) -> bool {
        !self.waiting.is_empty() || !self.again.is_empty()
    }

    fn is_idle(&self) -> bool {
        !self.waits() && self.in_flight == 0 && !matches!(self.state, State::Asked(_))
    }

    /// The place is in doubt: the recipient was not there (`ended`), or the way there was lost.
    fn doubt(&mut self, ended: bool) {
        if let State::Known(places) = &self.state {
            let newest = places.iter().map(|place| place.stamp).max().unwrap_or(0);
            if newest > self.newest {
                (self.newest, self.ended) = (newest, ended);
            } else if newest == self.newest {
                self.ended |= ended;
            }
        }
        if !matches!(self.state, State::Asked(_)) {
            self.state = State::Stale;
        }
    }
}

impl Engine {
    /// Sends to an id.
    pub(crate) fn send_to_id(&mut self, now: u64, id: &Id, payload: Arc<[u8]>, done: Done) {
        self.stats.sent += 1;
        let deadline = now.saturating_add(self.settings.timeout);
        let what = What::Id { id: id.clone(), again: false };
        let message = Outbound { payload, what, done, deadline };
        if self.closed {
            return self.finish(message.done, Outcome::Lost);
        }
        if !self.has_room_for(&message.done) {
            return self.finish(message.done, Outcome::Backpressure);
        }
        match self.routes.get(id) {
            Some(route) if matches!(route.state, State::Known(_)) && !route.waits() => {
                self.dispatch(now, id, message);
            }
            Some(route) => {
                let ask = matches!(route.state, State::Unknown);
                self.wait_for_route(id, message);
                if ask {
                    self.ask(id);
                }
            }
            None => {
                if self.routes.len() >= self.settings.routes {
                    self.routes.retain(|_, route| !route.is_idle());
                }
                if self.routes.len() >= self.settings.routes {
                    return self.finish(message.done, Outcome::Backpressure);
                }
                let route = Route {
                    state: State::Unknown,
                    waiting: VecDeque::new(),
                    bytes: 0,
                    again: VecDeque::new(),
                    in_flight: 0,
                    newest: 0,
                    ended: false,
                };
                self.routes.insert(id.clone(), route);
                self.ask(id);
                self.wait_for_route(id, message);
            }
        }
        self.settle(now);
    }

    fn wait_for_route(&mut self, id: &Id, message: Outbound) {
        let size = message.size();
        let fits = |used: usize, most: usize| used == 0 || used + size <= most;
        let limits = &self.settings;
        match self.routes.get_mut(id) {
            Some(route)
                if route.waiting.len() < limits.waiting
                    && fits(route.bytes, limits.recipient_bytes)
                    && fits(self.waiting_bytes, limits.waiting_bytes) =>
            {
                self.waiting_bytes += size;
                route.bytes += size;
                route.waiting.push_back(message);
            }
            _ => self.finish(message.done, Outcome::Backpressure),
        }
    }

    pub(super) fn ask(&mut self, id: &Id) {
        self.stats.lookups += 1;
        let request = self.number();
        let Some(route) = self.routes.get_mut(id) else { return };
        if let State::Asked(before) = route.state {
            self.requests.remove(&before);
        }
        route.state = State::Asked(request);
        let (newest, ended) = (route.newest, route.ended);
        self.requests.insert(request, Request::Lookup { id: id.clone() });
        self.tell(&ToDirectory::Lookup { request, id: id.clone(), newest, ended });
    }

    /// Sends one message to where the id is known to be.
    fn dispatch(&mut self, now: u64, id: &Id, message: Outbound) {
        let Some(route) = self.routes.get_mut(id) else {
            return self.finish(message.done, Outcome::Lost);
        };
        let State::Known(places) = &route.state else {
            return self.finish(message.done, Outcome::Lost);
        };
        let request = matches!(message.done, Done::Request(..));
        let newest = places.iter().max_by_key(|place| (place.stamp, place.host)).cloned();
        match &places[..] {
            [] => self.finish(message.done, Outcome::NotFound),
            [_, _, ..] if !request => {
                let places = places.clone();
                self.dispatch_to_all(now, id, &places, message);
            }
            _ => {
                let Some(place) = newest else { return };
                route.in_flight += 1;
                if place.member == self.own {
                    let number = self.number();
                    let reply = request.then(|| self.own_reply(number));
                    let payload = Arc::clone(&message.payload);
                    let verdict =
                        self.deliver(false, id.as_bytes(), place.key.into(), payload, reply);
                    if verdict == Verdict::Delivered {
                        self.route_answered(id);
                        let own = self.own;
                        return self.delivered(now, message.done, own, number);
                    }
                    return self.verdicts.push_back((message, verdict));
                }
                let flags = if request { flag::REQUEST } else { 0 };
                let (host, member, key) = (place.host, place.member, place.key.into());
                self.transmit(now, (host, member), flags, key, id.as_bytes(), message);
            }
        }
    }

    fn dispatch_to_all(&mut self, now: u64, id: &Id, places: &[Location], message: Outbound) {
        let fan = self.number();
        let parts = places.len() as u32;
        self.fans.insert(fan, Fan::new(Kind::All(message.done), parts));
        for place in places {
            let part = Outbound {
                payload: Arc::clone(&message.payload),
                what: What::Part { fan, memberships: 1, id: Some(id.clone()) },
                done: Done::Counted,
                deadline: message.deadline,
            };
            let payload = Arc::clone(&message.payload);
            if place.member == self.own {
                let verdict = self.deliver(false, id.as_bytes(), place.key.into(), payload, None);
                self.verdicts.push_back((part, verdict));
                continue;
            }
            let (host, member, key) = (place.host, place.member, place.key.into());
            self.transmit(now, (host, member), 0, key, id.as_bytes(), part);
        }
    }

    /// A message to the id has arrived, or has an outcome that says nothing about its place.
    pub(super) fn route_answered(&mut self, id: &Id) {
        let Some(route) = self.routes.get_mut(id) else { return };
        route.in_flight = route.in_flight.saturating_sub(1);
        if route.in_flight == 0 && matches!(route.state, State::Stale) {
            if route.waits() {
                self.ask(id);
            } else {
                route.state = State::Unknown;
            }
        }
    }

    pub(super) fn settle_id(&mut self, mut message: Outbound, verdict: Verdict) {
        let What::Id { id, again } = &mut message.what else { return };
        let id = id.clone();
        match verdict {
            Verdict::Delivered => self.finish(message.done, Outcome::Delivered),
            Verdict::Full => self.finish(message.done, Outcome::Backpressure),
            Verdict::TooLong => self.too_long(message.done),
            Verdict::Lost | Verdict::Spread(..) => {
                self.finish(message.done, Outcome::Lost);
                // The id may have moved away from a member that does not answer.
                if let Some(route) = self.routes.get_mut(&id) {
                    route.doubt(false);
                }
            }
            Verdict::NotHere | Verdict::Unsent => {
                let ended = verdict == Verdict::NotHere;
                let outcome = if ended { Outcome::NotFound } else { Outcome::Lost };
                match self.routes.get_mut(&id) {
                    Some(route) if !*again => {
                        route.doubt(ended);
                        *again = true;
                        // What waits was within the limits before.
                        self.waiting_bytes += message.size();
                        route.again.push_back(message);
                    }
                    found => {
                        if let Some(route) = found {
                            route.doubt(ended);
                        }
                        self.finish(message.done, outcome);
                    }
                }
            }
        }
        self.route_answered(&id);
    }

    /// A registration that a message to all found no more: look again next time.
    pub(super) fn distrust(&mut self, id: &Id) {
        if let Some(route) = self.routes.get_mut(id)
            && matches!(route.state, State::Known(_))
        {
            route.state = State::Stale;
            route.in_flight += 1;
            self.route_answered(id);
        }
    }

    /// The directory's answer to a look-up.
    pub(super) fn found(&mut self, now: u64, id: &Id, places: Vec<Location>) {
        let Some(route) = self.routes.get_mut(id) else { return };
        let nowhere = places.is_empty();
        route.state = State::Known(places);
        let mut waiting = std::mem::take(&mut route.again);
        waiting.append(&mut route.waiting);
        route.bytes = 0;
        for message in waiting {
            self.waiting_bytes -= message.size();
            // An earlier one may have found that this place is wrong, too.
            match self.routes.get_mut(id) {
                Some(route) if matches!(route.state, State::Known(_)) => {
                    self.dispatch(now, id, message);
                    self.settle(now);
                }
                Some(_) => self.wait_for_route(id, message),
                None => self.finish(message.done, Outcome::NotFound),
            }
        }
        let Some(route) = self.routes.get_mut(id) else { return };
        match route.state {
            // Messages wait behind one that found the place to be wrong and has its outcome.
            State::Unknown if route.waits() => self.ask(id),
            // Nowhere is not remembered: the id may register at any time.
            State::Known(_) if nowhere && route.is_idle() => {
                route.state = State::Unknown;
                if route.newest == 0 {
                    self.routes.remove(id);
                }
            }
            _ => {}
        }
    }

    pub(super) fn expire_routes(&mut self, now: u64) {
        if self.waiting_bytes == 0 {
            return;
        }
        let mut expired = Vec::new();
        for route in self.routes.values_mut() {
            let before = expired.len();
            while route.again.front().is_some_and(|message| message.deadline <= now) {
                expired.extend(route.again.pop_front());
            }
            while route.waiting.front().is_some_and(|message| message.deadline <= now) {
                let message = route.waiting.pop_front();
                route.bytes -= message.as_ref().map_or(0, Outbound::size);
                expired.extend(message);
            }
            // A look-up that was not answered in time is not waited for by later messages.
            if expired.len() > before
                && !route.waits()
                && let State::Asked(request) = route.state
            {
                self.requests.remove(&request);
                route.state = State::Unknown;
            }
        }
        for message in expired {
            self.waiting_bytes -= message.size();
            // Whether the id is registered is unknown: the directory has not answered.
            self.finish(message.done, Outcome::Lost);
        }
    }

    /// Asks again for what an earlier directory has not answered.
    pub(super) fn ask_again(&mut self) {
        let asked =
            |(id, route): (&Id, &Route)| matches!(route.state, State::Asked(_)).then(|| id.clone());
        let ids: Vec<Id> = self.routes.iter().filter_map(asked).collect();
        self.requests.retain(|_, request| !matches!(request, Request::Lookup { .. }));
        ids.iter().for_each(|id| self.ask(id));
    }

    fn own_reply(&self, sequence: u64) -> crate::relay::message::ReplyTo {
        crate::relay::message::ReplyTo { member: self.own, generation: 0, sequence }
    }
}
