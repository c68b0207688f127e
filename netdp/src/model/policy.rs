//! User policy: the grammar of a rule and the operations on a network's rules.
//!
//! ```text
//! # comment
//! allow|deny from ADDRESS|CIDR|FIRST-LAST|any
//! ```
//!
//! Owns text ↔ [`Rule`]. Knows nothing of how a backend matches.

use std::{fmt, net::Ipv4Addr, str::FromStr};

use ipnet::{Ipv4Net, Ipv4Subnets};

use super::{Action, Model, Network, Refusal, Rule};

/// Bad lines that one refusal names; the rest is counted.
const REPORTED_LINES: usize = 10;

/// Reads a whole policy: one rule per line, blank lines and `#` comments skipped.
///
/// # Errors
/// Names every line that is no rule, with its number and the reason.
pub fn parse(text: &str) -> Result<Vec<Rule>, Refusal> {
    let mut rules = Vec::new();
    let mut errors = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let rule = line.split('#').next().unwrap_or_default().trim();
        if rule.is_empty() {
            continue;
        }
        match rule.parse() {
            Ok(rule) => rules.push(rule),
            Err(Refusal { message, .. }) => errors.push(format!("line {}: {message}", index + 1)),
        }
    }
    if errors.is_empty() {
        return Ok(rules);
    }
    let more = errors.len().saturating_sub(REPORTED_LINES);
    errors.truncate(REPORTED_LINES);
    if more > 0 {
        errors.push(format!("and {more} more bad lines"));
    }
    Err(Refusal::invalid(errors.join("; ")))
}

impl FromStr for Rule {
    type Err = Refusal;

    fn from_str(text: &str) -> Result<Self, Refusal> {
        let words: Vec<&str> = text.split_whitespace().collect();
        let (action, source) = match words[..] {
            ["allow", "from", source] => (Action::Allow, source),
            ["deny", "from", source] => (Action::Deny, source),
            _ => {
                return Err(Refusal::invalid(format!(
                    "{text:?} is no rule: write `allow|deny from ADDRESS|CIDR|FIRST-LAST|any`"
                )));
            }
        };
        let (first, last) = parse_source(source).map_err(Refusal::invalid)?;
        Ok(Self { action, first, last })
    }
}

fn parse_source(source: &str) -> Result<(Ipv4Addr, Ipv4Addr), String> {
    if source == "any" {
        return Ok((Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST));
    }
    if source.contains(':') {
        return Err(format!("IPv6 sources are not supported yet ({source}): give IPv4 ones"));
    }
    if let Some((first, last)) = source.split_once('-') {
        let (first, last) = (parse_address(first)?, parse_address(last)?);
        if first > last {
            return Err(format!("the range {source} is empty: write {last}-{first}"));
        }
        return Ok((first, last));
    }
    if source.contains('/') {
        let net: Ipv4Net = source
            .parse()
            .map_err(|_| format!("{source:?} is no CIDR: write one like 192.0.2.0/24"))?;
        if net.addr() != net.network() {
            return Err(format!("{source} has host bits set: write {}", net.trunc()));
        }
        return Ok((net.network(), net.broadcast()));
    }
    let address = parse_address(source)?;
    Ok((address, address))
}

fn parse_address(text: &str) -> Result<Ipv4Addr, String> {
    text.parse().map_err(|_| format!("{text:?} is no IPv4 address: write one like 192.0.2.1"))
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
        })
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} from ", self.action)?;
        if self.first == Ipv4Addr::UNSPECIFIED && self.last == Ipv4Addr::BROADCAST {
            return f.write_str("any");
        }
        if self.first == self.last {
            return write!(f, "{}", self.first);
        }
        let mut prefixes = Ipv4Subnets::new(self.first, self.last, 0);
        match (prefixes.next(), prefixes.next()) {
            (Some(net), None) => write!(f, "{net}"),
            _ => write!(f, "{}-{}", self.first, self.last),
        }
    }
}

impl Model {
    /// Replaces a network's rules. The same rules again are no change.
    ///
    /// # Errors
    /// Refuses an unknown network.
    pub fn set_policy(&mut self, network: &str, rules: Vec<Rule>) -> Result<(), Refusal> {
        let network = self.network_mut(network)?;
        if network.policy != rules {
            network.replace_policy(rules);
        }
        Ok(())
    }

    /// Appends rules.
    ///
    /// # Errors
    /// Refuses an unknown network, and an empty list.
    pub fn add_rules(&mut self, network: &str, rules: &[Rule]) -> Result<(), Refusal> {
        let network = self.network_mut(network)?;
        if rules.is_empty() {
            return Err(Refusal::invalid("no rule given: give at least one"));
        }
        let mut policy = network.policy.clone();
        policy.extend_from_slice(rules);
        network.replace_policy(policy);
        Ok(())
    }

    /// Removes the rule with this number, counted from 1.
    ///
    /// # Errors
    /// Refuses an unknown network, and a number that no rule has.
    pub fn remove_rule(&mut self, network: &str, number: usize) -> Result<Rule, Refusal> {
        let network = self.network_mut(network)?;
        let mut policy = network.policy.clone();
        let index =
            number.checked_sub(1).filter(|&index| index < policy.len()).ok_or_else(|| {
                Refusal::not_found(format!(
                    "network {:?} has no rule {number}: it has {}, numbered from 1",
                    network.name,
                    policy.len()
                ))
            })?;
        let removed = policy.remove(index);
        network.replace_policy(policy);
        Ok(removed)
    }
}

impl Network {
    fn replace_policy(&mut self, rules: Vec<Rule>) {
        self.policy = rules;
        self.policy_generation = self.policy_generation.wrapping_add(1);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::{RefusalKind, tests::model_with_network};

    #[track_caller]
    fn check(rule: &str, first: [u8; 4], last: [u8; 4]) {
        let parsed: Rule = rule.parse().unwrap();
        assert_eq!((parsed.first, parsed.last), (first.into(), last.into()), "{rule}");
        assert_eq!(parsed.to_string(), rule.split_whitespace().collect::<Vec<_>>().join(" "));
    }

    #[track_caller]
    fn check_refused(policy: &str, message: &str) {
        let refusal = parse(policy).unwrap_err();
        assert_eq!(refusal.kind, RefusalKind::Invalid);
        assert_eq!(refusal.message, message);
    }

    #[test]
    fn every_form_of_source_is_read_and_written() {
        check("allow from 192.0.2.1", [192, 0, 2, 1], [192, 0, 2, 1]);
        check("deny  from\t192.0.2.0/24", [192, 0, 2, 0], [192, 0, 2, 255]);
        check("allow from 192.0.2.1-192.0.2.3", [192, 0, 2, 1], [192, 0, 2, 3]);
        check("deny from any", [0; 4], [255; 4]);
        check("deny from 0.0.0.0/1", [0; 4], [127, 255, 255, 255]);
    }

    #[test]
    fn comments_and_blank_lines_are_no_rules() {
        let policy = "# office\n\n  allow from 192.0.2.1 # desk\n\t\r\ndeny from any";
        let rules: Vec<_> = parse(policy).unwrap().iter().map(Rule::to_string).collect();
        assert_eq!(rules, ["allow from 192.0.2.1", "deny from any"]);
        assert_eq!(parse("").unwrap(), []);
    }

    #[test]
    fn bad_lines_are_named_with_their_reasons() {
        check_refused(
            "permit from any\nallow from any\n\nallow from 300.1.1.1\ndeny from 10.0.0.5/8",
            "line 1: \"permit from any\" is no rule: \
             write `allow|deny from ADDRESS|CIDR|FIRST-LAST|any`; \
             line 4: \"300.1.1.1\" is no IPv4 address: write one like 192.0.2.1; \
             line 5: 10.0.0.5/8 has host bits set: write 10.0.0.0/8",
        );
        check_refused(
            "deny from 10.0.0.9-10.0.0.1",
            "line 1: the range 10.0.0.9-10.0.0.1 is empty: write 10.0.0.1-10.0.0.9",
        );
        check_refused(
            "allow from fd00::/8",
            "line 1: IPv6 sources are not supported yet (fd00::/8): give IPv4 ones",
        );
        check_refused(
            "allow from 10.0.0.0/33",
            "line 1: \"10.0.0.0/33\" is no CIDR: write one like 192.0.2.0/24",
        );
    }

    #[test]
    fn a_flood_of_bad_lines_is_cut_short() {
        let message = parse(&"x\n".repeat(25)).unwrap_err().message;
        assert!(message.ends_with("; and 15 more bad lines"), "{message}");
        assert!(!message.contains("line 11:"), "{message}");
    }

    #[test]
    fn the_generation_moves_with_every_change_and_only_then() {
        let mut model = model_with_network("a");
        let generation = |model: &Model| model.network("a").unwrap().policy_generation;
        let rules = parse("allow from 192.0.2.1\ndeny from any").unwrap();

        model.set_policy("a", rules.clone()).unwrap();
        let first = generation(&model);
        model.set_policy("a", rules.clone()).unwrap();
        assert_eq!(generation(&model), first);

        model.add_rules("a", &rules[..1]).unwrap();
        assert_eq!(generation(&model), first + 1);
        assert_eq!(model.remove_rule("a", 2).unwrap(), rules[1]);
        assert_eq!(generation(&model), first + 2);
        assert_eq!(model.network("a").unwrap().policy, [rules[0], rules[0]]);
    }

    #[test]
    fn numbers_without_a_rule_and_unknown_networks_are_refused() {
        let mut model = model_with_network("a");
        model.add_rules("a", &parse("deny from any").unwrap()).unwrap();
        for number in [0, 2, usize::MAX] {
            let refusal = model.remove_rule("a", number).unwrap_err();
            assert_eq!(refusal.kind, RefusalKind::NotFound, "{number}");
        }
        assert_eq!(model.add_rules("a", &[]).unwrap_err().kind, RefusalKind::Invalid);
        assert_eq!(model.set_policy("b", Vec::new()).unwrap_err().kind, RefusalKind::NotFound);
    }

    proptest! {
        #[test]
        fn a_rule_reads_as_it_was_written(a in any::<u32>(), b in any::<u32>(), deny in any::<bool>()) {
            let (first, last) = (a.min(b).into(), a.max(b).into());
            let action = if deny { Action::Deny } else { Action::Allow };
            let rule = Rule { action, first, last };
            prop_assert_eq!(rule.to_string().parse::<Rule>(), Ok(rule));
        }

        #[test]
        fn a_prefix_reads_as_it_was_written(address in any::<u32>(), prefix in 1u8..32) {
            let net = Ipv4Net::new(address.into(), prefix).unwrap().trunc();
            let rule = Rule { action: Action::Allow, first: net.network(), last: net.broadcast() };
            prop_assert_eq!(rule.to_string(), format!("allow from {net}"));
            prop_assert_eq!(rule.to_string().parse::<Rule>(), Ok(rule));
        }

        #[test]
        fn no_text_upsets_the_parser(text in "(allow|deny|from|any|[0-9./ :#\n-]|\\PC){0,40}") {
            let _ = parse(&text);
        }
    }
}
